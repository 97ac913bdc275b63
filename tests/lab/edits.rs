//! Edits of the policy file under a running guard: broken ones change nothing, good ones are in force at once.

use std::time::{Duration, Instant};

use aya::maps::{Array, Map, MapData};
use guard_common::abi::Active;
use guard_policy::{compile::compile, diagnostic::Source, node_facts::NodeFacts};
use lab::{
    client::{Outcome, through},
    lab::{Lab, POLICY},
    net::Who,
    process::until,
};
use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedRandom};

const BROKEN: usize = 200;
const GOOD: usize = 50;
const IN_FORCE: Duration = Duration::from_millis(100);

#[test]
fn two_hundred_broken_documents_change_nothing_and_each_error_names_a_line() {
    let mut lab = Lab::new(POLICY).unwrap();
    let seed = rand::random::<u64>();
    println!("broken edits: seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let epoch = epoch_reader(&lab);
    let before = epoch();
    let mut last = String::new();
    for number in 0..BROKEN {
        let text =
            std::iter::repeat_with(|| broken(&mut random)).find(|text| *text != last && is_rejected(text)).unwrap();
        lab.write_policy(&text).unwrap();
        let rejections = number + 1;
        let daemon = lab.daemon().unwrap();
        let rejected = until("the rejection", Duration::from_secs(5), || {
            Ok(daemon.printed().matches("the edit is rejected").count() >= rejections)
        });
        rejected.unwrap_or_else(|error| panic!("{error}: document {number}\n{text}"));
        let status = daemon.status().unwrap();
        let error = status.policy.last_error.expect("an error");
        let place = error.split("policy.yaml:").nth(1).and_then(|rest| rest.split(':').next()?.parse::<usize>().ok());
        assert!(place.is_some_and(|line| line >= 1), "no line is named:\n{error}\n{text}");
        assert_eq!(
            (epoch(), status.policy.epoch),
            (before, before),
            "document {number} changed what is enforced\n{text}"
        );
        assert!(!status.weakened.is_empty(), "a rejected edit is told in the first line of status");
        if number % 20 == 0 {
            enforced(&lab);
        }
        last = text;
    }
    enforced(&lab);
    println!("broken edits: {BROKEN} documents, 0 changed what is enforced, {BROKEN} named a line");
}

#[test]
fn a_good_edit_is_in_force_within_a_tenth_of_a_second() {
    come_into_force(Lab::new(POLICY).unwrap());
}

/// Whatever the guard of the lab may do.
pub(crate) fn come_into_force(mut lab: Lab) {
    let epoch = epoch_reader(&lab);
    let mut took: Vec<Duration> = Vec::new();
    for number in 0..GOOD {
        let text = POLICY.replace("10.0.8.66/32", &format!("10.0.8.{}/32", 100 + number));
        let before = epoch();
        let written = Instant::now();
        lab.write_policy(&text).unwrap();
        while epoch() == before {
            assert!(written.elapsed() < Duration::from_secs(5), "edit {number} never came into force");
            std::thread::sleep(Duration::from_micros(200));
        }
        took.push(written.elapsed());
    }
    took.sort_unstable();
    let (median, longest) = (took[GOOD / 2], took[GOOD - 1]);
    println!("good edits: in force after {median:?} (median of {GOOD}), at most {longest:?}");
    assert!(median <= IN_FORCE, "{median:?}");
    // What was excepted before is admitted now: the kernel follows the last edit, not only its number.
    assert_eq!(lab.healthz(Who::Excepted, false).unwrap(), Outcome::Http(200));
    assert_eq!(lab.daemon().unwrap().status().unwrap().policy.last_error, None);
}

#[test]
fn a_start_with_a_broken_policy_keeps_what_is_in_force_and_admits_no_dial() {
    let mut lab = Lab::new(POLICY).unwrap();
    lab.daemon.take().unwrap().kill().unwrap();
    lab.write_policy(&POLICY.replace("mode: Enforce", "mode: Off")).unwrap();
    lab.start_daemon().unwrap().connected().unwrap();
    enforced(&lab);
    let refused = through(lab.server().unwrap(), "10.0.0.2:10250").err();
    assert!(
        matches!(&refused, Some(Outcome::NotConnected(502, text)) if text.contains("no policy is in force")),
        "{refused:?}"
    );
    let status = lab.daemon().unwrap().status().unwrap();
    assert!(
        !status.weakened.is_empty() && status.policy.last_error.is_some_and(|error| error.contains("policy.yaml:6:9"))
    );
    // Mended, it all works again.
    lab.write_policy(POLICY).unwrap();
    until("the dial is admitted", Duration::from_secs(5), || {
        Ok(lab.healthz_dialled("10.0.0.2:10250")? == Outcome::Http(200))
    })
    .unwrap();
}

/// The peer is admitted, the stranger is not.
fn enforced(lab: &Lab) {
    assert_eq!(lab.healthz(Who::Peer, false).unwrap(), Outcome::Http(200));
    assert_eq!(lab.healthz(Who::Stranger, false).unwrap(), Outcome::NoAnswer);
}

/// Reads the epoch in force straight from the kernel.
fn epoch_reader(lab: &Lab) -> impl Fn() -> u32 + use<> {
    let map = MapData::from_pin(lab.pins().join("maps/ACTIVE")).unwrap();
    let active: Array<MapData, Active> = Map::from_map_data(map).unwrap().try_into().unwrap();
    move || active.get(&0, 0).unwrap().epoch
}

fn is_rejected(text: &str) -> bool {
    compile(&Source { path: "policy.yaml".into(), text: text.to_owned() }, &NodeFacts::default()).is_err()
}

/// A document that was good, with one to three things done to it that happen to documents.
fn broken(random: &mut StdRng) -> String {
    let mut lines: Vec<String> = POLICY.lines().map(str::to_owned).collect();
    for _ in 0..random.random_range(1..=3) {
        let at = random.random_range(0..lines.len());
        let line = lines[at].clone();
        match random.random_range(0..9) {
            0 => drop(lines.remove(at)),
            1 => lines[at] = format!(" {line}"),
            2 => lines[at] = line.replacen("  ", "\t", 1),
            3 => lines[at] = line.replace(':', ""),
            4 => lines[at] = line.replace(['{', '}', '[', ']'], ""),
            5 => lines.insert(at, line),
            6 => {
                lines[at] =
                    line.chars().map(|c| if c.is_ascii_digit() && random.random_bool(0.5) { 'x' } else { c }).collect()
            }
            7 => {
                let cut = (0..=line.len()).filter(|at| line.is_char_boundary(*at)).collect::<Vec<_>>();
                lines[at].truncate(*cut.choose(random).unwrap());
            }
            _ => {
                let words = ["allow", "tunnel", "mode", "kind", "ports", "cidr", "node", "name", "dial"];
                let word = words.choose(random).unwrap();
                lines[at] = line.replace(word, &format!("{word}s"));
            }
        }
    }
    lines.join("\n") + "\n"
}
