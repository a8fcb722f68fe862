"""The core: plan, injection, containers, restore, profiling."""
