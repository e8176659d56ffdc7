"""Every mechanism on the same tasks, skeleton, budget and seeds, measured. May import models, nn and what is below."""
