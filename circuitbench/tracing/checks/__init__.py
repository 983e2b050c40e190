"""What `circuitbench.check` verifies, by kind: the map's words, single sites, scans, residual sums."""
