"""Small tasks on which the lens can be tried: models that train in seconds. May import models and transformers."""
