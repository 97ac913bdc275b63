//! The bar of the demo as a test: every line as expected, with the right reason.

use lab::{
    attempts::main_job,
    lab::{Lab, POLICY},
};

#[test]
fn every_attempt_of_the_main_job_ends_as_expected() {
    let mut lab = Lab::new(POLICY).unwrap();
    let lines = main_job(&mut lab, |_| Ok(())).unwrap();
    let wrong: Vec<String> = lines
        .iter()
        .filter(|line| !line.ok)
        .map(|line| format!("{} -> {}: wanted {}, saw {} {}", line.who, line.to, line.expected, line.seen, line.reason))
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    println!("main job: {0} of {0} as expected", lines.len());
}
