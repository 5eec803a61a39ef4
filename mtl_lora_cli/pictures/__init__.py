"""Pictures and maps: decoding, augmentation and drawing. Pillow and NumPy; loads no torch."""
