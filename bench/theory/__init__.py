"""Experiments that show what theory says of error feedback, each with a figure."""
