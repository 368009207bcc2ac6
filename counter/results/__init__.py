"""What a run did: histograms, results, the timeline; all of it merges exactly."""
