"""Mechanisms as modules, one file each, by family. May import attend, scan and what lies below them; never models."""
