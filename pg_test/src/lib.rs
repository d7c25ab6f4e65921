//! Harness for throw-away clusters.
