//! The bar of the demo as a test: every line as expected, with the right reason.

use lab::{
    lab::{Lab, POLICY},
    main_job::main_job,
};

#[test]
fn every_attempt_of_the_main_job_ends_as_expected() {
    let mut lab = Lab::new(POLICY).unwrap();
    let lines = main_job(&mut lab, |_| Ok(())).unwrap();
    let wrong: Vec<String> = lines.iter().filter(|line| !line.ok).map(ToString::to_string).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    println!("main job: {0} of {0} as expected", lines.len());
}
