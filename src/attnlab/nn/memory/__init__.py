"""Mechanisms that learn while they read: their state is the weights of a network. May import what nn may import."""
