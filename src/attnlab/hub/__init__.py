"""Reading the authors' checkpoints, and swapping mechanisms into other libraries' models. May import models and recipes."""
