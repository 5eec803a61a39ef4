"""Prediction at scale: folders of rows in, folders of rows with answers out, in parts."""
