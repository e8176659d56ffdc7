"""Looking inside: what attention does, in numbers and pictures. May import models and what lies below them."""
