"""The papers' networks: a skeleton, a mixer and a size table each. May import nn and what lies below it."""
