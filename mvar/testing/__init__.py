"""What tests and benchmarks share: small stores and runs, ranks on one machine, the bytes that an engine holds."""
