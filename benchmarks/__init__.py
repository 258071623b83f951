"""Recipes, speed and memory, measured; the results are in results/."""
