"""Image networks. May import skeletons and nn."""
