"""Networks that generate by removing noise. May import models.skeletons and nn."""
