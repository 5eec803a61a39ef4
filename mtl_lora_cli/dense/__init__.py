"""Maps of pictures, learned: backbones, streams, decoders, losses, and the host of the port."""
