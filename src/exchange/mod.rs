//! Exchange.
#[repr(C)]
pub struct WorkerStatus {}
