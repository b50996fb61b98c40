"""Sweeps: whole tables of cases (operators, architectures, probes) run against one backend and compared with eager."""
