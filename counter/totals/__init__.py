"""Where the total is and what it survives: the counters, the stores, who keeps them."""
