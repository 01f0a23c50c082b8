"""Topic: what it takes to know every sample's length and cost before training begins."""
