//! Owns the proof that kernel and host decide alike, by direct access and by helper loads, and that the proof can fail.
//! Called by the test runner.
//! Must never take a comparison for one that compared nothing.

use std::path::PathBuf;

use guard_common::Reason;
use lab::agree::{compare, load};

const RULESETS: usize = 40;

#[test]
fn kernel_and_host_agree() {
    let per_ruleset = if std::env::var_os("NODEGUARD_SOAK").is_some() { 25_000 } else { 700 };
    let tally = compare(&object("guard-dev.o"), RULESETS, per_ruleset);
    println!(
        "agree: {} decisions compared ({} frames too short for a test run), {} differences; reasons {:?}",
        tally.compared,
        tally.too_short,
        tally.differences.len(),
        tally.reasons
    );
    assert!(tally.differences.is_empty(), "{:#?}", &tally.differences[..tally.differences.len().min(5)]);
    assert!(tally.compared >= 40_000, "20,000 packets by each of the two ways");
    // Where a process may connect to is not a packet's business: tests/lab/hub.rs and companion.rs.
    let of_connections = [Reason::ControlPlanePort, Reason::CompanionDestination];
    for reason in Reason::ALL.into_iter().filter(|reason| !of_connections.contains(reason)) {
        assert!(tally.reasons.contains_key(reason.name()), "no packet came to {}", reason.name());
    }
}

#[test]
fn a_planted_mutant_is_caught() {
    let tally = compare(&object("guard-mutant.o"), RULESETS, 400);
    println!("mutant: {} decisions compared, {} differences", tally.compared, tally.differences.len());
    assert!(!tally.differences.is_empty(), "a kernel build that takes fragments for whole packets went unseen");
}

/// The product's own programs pass the verifier; the figures show growth.
#[test]
fn every_program_loads() {
    every_program_of("guard.o");
    every_program_of("guard-log.o");
}

fn every_program_of(name: &str) {
    let mut ebpf = load(&object(name));
    for (program_name, program) in ebpf.programs_mut() {
        match program {
            aya::programs::Program::CgroupSkb(program) => program.load().unwrap(),
            aya::programs::Program::CgroupSockAddr(program) => program.load().unwrap(),
            aya::programs::Program::CgroupSock(program) => program.load().unwrap(),
            aya::programs::Program::SockOps(program) => program.load().unwrap(),
            aya::programs::Program::Xdp(program) => program.load().unwrap(),
            aya::programs::Program::SchedClassifier(program) => program.load().unwrap(),
            other => panic!("{program_name} is a {:?}", other.prog_type()),
        }
        let info = program.info().unwrap();
        println!(
            "load: {name}: {program_name}: {} instructions verified, {} bytes translated",
            info.verified_instruction_count().unwrap_or_default(),
            info.size_translated().unwrap_or_default()
        );
    }
    for program in nodeguard::kernel::links::object::PROGRAMS
        .into_iter()
        .chain(nodeguard::kernel::links::edge_hooks::EDGE_PROGRAMS)
    {
        assert!(ebpf.program(program).is_some(), "the object has no {program}");
    }
}

pub(crate) fn object(name: &str) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/bpf").join(name);
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error} (run `cargo xtask build-ebpf`)", path.display()))
}
