"""Networks that answer with positions in their input, and the geometric problems that they are asked."""
