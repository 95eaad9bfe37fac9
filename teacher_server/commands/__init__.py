"""Commands that ask a running teacher: `ping`, `score` and `top`."""
