//! The bar of the demo as a test: every line as expected, with the right reason.

use lab::{
    lab::{Lab, POLICY},
    main_job::main_job,
    table::Table,
};

#[test]
fn every_attempt_of_the_main_job_ends_as_expected() {
    let mut lab = Lab::new(POLICY).unwrap();
    let mut table = Table::default();
    main_job(&mut lab, &mut table).unwrap();
    assert_eq!(table.sum().unwrap().1, [""; 0]);
}
