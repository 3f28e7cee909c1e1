"""The network lab: training jobs on hosts of their own, joined by links as slow as one likes."""
