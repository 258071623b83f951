"""What the demo model is used for: `make demo`, concepts to learn, and how well they are learned."""
