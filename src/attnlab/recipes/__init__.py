"""Training and inference methods around networks: losses, merging, schedules. May import models and nn."""
