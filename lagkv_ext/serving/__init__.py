"""Runs inside an inference server: live metrics (`monitor`) and gradual rollout with a guard (`rollout`)."""
