"""Networks that hear: frames of sound to classes. May import skeletons and nn."""
