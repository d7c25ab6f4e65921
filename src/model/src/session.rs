//! The exchange as a state machine without I/O: `step(event) -> actions`.
