"""How long the planner takes, and how much memory."""
