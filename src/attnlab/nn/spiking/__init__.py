"""Mechanisms of spiking neurons, and the neurons themselves. May import what nn may import."""
