"""What a server tells: metrics, logs, traces, and what the answers say about the traffic."""
