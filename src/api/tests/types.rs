//! `tandem.hlc`, `tandem.position` and `tandem.cells` as SQL values.
#[pgrx::pg_schema]
mod tests {
    use crate::api::tests::*;

    const A: &str = "'2026-11-23 15:45:12.345Z/17@1'";

    #[pg_test]
    fn hlc_text_goes_in_and_out() {
        assert_eq!(value::<String>(&format!("select {A}::tandem.hlc::text")), "2026-11-23 15:45:12.345Z/17@1");
        assert_eq!(value::<String>("select '0'::tandem.hlc::text"), "0");
        assert_eq!(value::<String>(&format!("select {A}::tandem.position::text")), "2026-11-23 15:45:12.345Z/17@1");
        for bad in ["", "x", "2026-11-23", "2026-11-23 15:45:12.345Z/17@64", "-1"] {
            assert_eq!(refusal(&format!("select '{bad}'::tandem.hlc")).sqlstate, "22P02", "{bad}");
        }
    }

    #[pg_test]
    fn hlc_has_its_parts() {
        run("set local search_path = public, tandem");
        assert_eq!(value::<i32>(&format!("select tandem.hlc_node({A})")), 1);
        assert_eq!(value::<i32>(&format!("select tandem.hlc_counter({A})")), 17);
        assert!(value::<bool>(&format!("select {A}::tandem.hlc::timestamptz = '2026-11-23 15:45:12.345Z'")));
        assert!(value::<bool>(&format!("select {A}::tandem.hlc::int8::tandem.hlc = {A}")));
    }

    #[pg_test]
    fn hlc_binary_goes_in_and_out() {
        assert_eq!(value::<i32>(&format!("select length(tandem.hlc_send({A}))")), 8);
        assert!(value::<bool>(&format!("select tandem.hlc_send({A}) = int8send({A}::tandem.hlc::int8)")));
        run("create table hlc_binary (v tandem.hlc, p tandem.position, c tandem.cells)");
        run(&format!("insert into hlc_binary values ({A}, {A}, 'birth=2026-11-23 15:45:12.345Z/17@1')"));
        assert_eq!(value::<i64>("select count(*) from hlc_binary where v::text = p::text and c is not null"), 1);
    }

    #[pg_test]
    fn hlc_sorts_and_hashes() {
        run("set local search_path = public, tandem");
        run("create table hlc_sorted (v tandem.hlc primary key)");
        run("insert into hlc_sorted select i::int8::tandem.hlc from generate_series(1, 500) i");
        run("analyze hlc_sorted");
        assert_eq!(value::<i64>("select max(v)::int8 from hlc_sorted"), 500);
        assert_eq!(value::<i64>("select min(v)::int8 from hlc_sorted"), 1);
        assert_eq!(
            value::<i64>(
                "select count(*) from hlc_sorted where v between 10::int8::tandem.hlc and 19::int8::tandem.hlc"
            ),
            10
        );
        run("set local enable_mergejoin = off; set local enable_nestloop = off");
        assert_eq!(value::<i64>("select count(*) from hlc_sorted a join hlc_sorted b using (v)"), 500);
    }

    #[pg_test]
    fn versions_and_positions_are_not_compared() {
        run("set local search_path = public, tandem");
        assert_eq!(refusal(&format!("select {A}::tandem.hlc < {A}::tandem.position")).sqlstate, "42883");
    }

    #[pg_test]
    fn cells_text_goes_in_and_out() {
        let cells = "birth=2026-11-23 15:45:12.345Z/17@1,3=2026-11-23 15:45:13.345Z/17@2";
        assert_eq!(value::<String>(&format!("select '{cells}'::tandem.cells::text")), cells);
        assert_eq!(refusal("select 'nonsense'::tandem.cells").sqlstate, "22P02");
    }
}
