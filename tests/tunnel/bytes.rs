//! 64 MiB each way with the close right behind them, many times: nothing is lost, nothing is changed.

use std::{
    io::{Read, Write},
    time::{Duration, Instant},
};

use lab::{
    client::{pattern, sum, through},
    lab::{Lab, POLICY},
    process::until,
};

const ROUNDS: usize = 100;
const SIZE: usize = 64 << 20;
const SERVER: &str = "10.0.0.2:7001";

#[test]
fn sixty_four_mib_each_way_with_the_close_right_behind() {
    let lab = Lab::new(POLICY).unwrap();
    let server = lab.server().unwrap();
    let open = || through(server, SERVER).unwrap_or_else(|outcome| panic!("{outcome:?}"));
    let bytes = pattern(7, SIZE);
    let wanted = sum(&bytes);
    let started = Instant::now();
    for round in 0..ROUNDS {
        let mut stream = open();
        writeln!(stream, "PUT {round}").unwrap();
        stream.write_all(&bytes).unwrap();
        drop(stream);
        let mut said = String::new();
        until("the sum", Duration::from_secs(30), || {
            let mut stream = open();
            writeln!(stream, "SUM {round}")?;
            said.clear();
            stream.read_to_string(&mut said)?;
            Ok(said.trim() != "none")
        })
        .unwrap();
        assert_eq!(said.trim(), wanted, "to the node, round {round}");

        let mut stream = open();
        writeln!(stream, "GET {SIZE} 7").unwrap();
        let mut got = Vec::with_capacity(SIZE);
        stream.read_to_end(&mut got).unwrap();
        assert_eq!(sum(&got), wanted, "from the node, round {round}");
    }
    println!("bytes: {ROUNDS} times 64 MiB each way, byte-identical, {:.0} s", started.elapsed().as_secs_f64());
}
