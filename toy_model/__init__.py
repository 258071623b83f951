"""The demo model: a toy world drawn by rule, the networks trained on it, and a judge of what they draw."""
