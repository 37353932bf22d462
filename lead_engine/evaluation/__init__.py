"""One trained model: held-out loss, generated answers and exact match, public benchmarks by lm-eval."""
