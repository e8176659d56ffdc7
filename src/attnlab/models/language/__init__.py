"""Language models. May import skeletons and nn."""
