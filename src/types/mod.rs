//! SQL edges of the model's values: `tandem.hlc`, `tandem.position`, `tandem.cells`.
mod cells;
mod hlc;

pub use cells::parse as parse_cells;
pub use hlc::{SqlHlc, SqlPosition, unix_millis};

pgrx::extension_sql!(
    "create type hlc;\ncreate type \"position\";\ncreate type cells;",
    name = "shell_types",
    bootstrap
);
pgrx::extension_sql_file!(
    "../../sql/types.sql",
    name = "types",
    requires = [
        hlc::hlc_in,
        hlc::hlc_out,
        hlc::hlc_recv,
        hlc::hlc_send,
        hlc::hlc_time,
        hlc::hlc_counter,
        hlc::hlc_node,
        hlc::position_in,
        hlc::position_out,
        hlc::position_recv,
        hlc::position_send,
        hlc::position_time,
        cells::cells_in,
        cells::cells_out,
        cells::cells_recv,
        cells::cells_send
    ]
);
pgrx::extension_sql_file!("../../sql/catalog.sql", name = "catalog", requires = ["types"]);
