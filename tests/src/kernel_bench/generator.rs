//! Owns the flood: SYNs of strangers, put on the node's wire by a kernel program.
//! Called by `flood`.
//! Must never send anywhere but to the node of its lab, and never longer than it is told.
//!
//! A test run with live frames sends what its program redirects. Sending costs half of what a guard needs to drop: the node limits the flood.

use std::{
    net::Ipv4Addr,
    sync::{
        Barrier,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use aya::{
    Ebpf,
    maps::{Array, DevMap, MapData},
    programs::{TestRun, TestRunAttrs, TestRunOptions, Xdp},
};
use guard_common::{abi::Flood, packet::TCP};
use lab::{
    agree::load,
    net::Who,
    packets::{Flow, ethernet, ip, syn, wire::hardware},
    traffic::{OTHER_CPU, pin},
};
use nix::{
    sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction},
    unistd::{Pid, gettid},
};

use crate::{object, precedence, undisturbed};

/// Frames that a test run hands over at a time.
const BATCH: u32 = 64;
/// Frames of one test run, more than it ever sends: setting one up takes tens of milliseconds.
const MANY: u32 = 1 << 30;
/// The first source, a stranger of 10.0.16.0/20: nobody answers there, and no rule admits them.
const FIRST: Ipv4Addr = Ipv4Addr::from_octets([10, 0, Flood::SOURCE.to_be_bytes()[0], Flood::SOURCE.to_be_bytes()[1]]);

/// The program that floods.
pub(crate) struct Generator {
    ebpf: Ebpf,
    flood: Array<MapData, Flood>,
    _wire: DevMap<MapData>,
    from: [u8; 6],
}

impl Generator {
    /// To be called in the namespace where the other end of the node's wire is; the program floods from any other one, too.
    pub(crate) fn new() -> Result<Generator> {
        let mut ebpf = load(&object()?);
        let program: &mut Xdp = ebpf.program_mut("bench_flood").context("bench_flood")?.try_into()?;
        program.load().context("bench_flood")?;
        let (interface, from) = hardware("to-node")?;
        let mut wire = DevMap::try_from(ebpf.take_map("WIRE").context("WIRE")?)?;
        wire.set(0, u32::try_from(interface)?, None, 0)?;
        let flood = Array::try_from(ebpf.take_map("FLOOD").context("FLOOD")?)?;
        let action = SigAction::new(SigHandler::Handler(nothing), SaFlags::empty(), SigSet::empty());
        // SAFETY: the handler does nothing.
        unsafe { sigaction(Signal::SIGUSR1, &action)? };
        Ok(Generator { ebpf, flood, _wire: wire, from })
    }

    /// The first source's SYN to a port of the node, whose hardware address this is.
    pub(crate) fn frame(&self, to: [u8; 6], port: u16) -> Vec<u8> {
        let flow = Flow { from: (FIRST, Flood::SOURCE_PORT).into(), to: (Who::Node.v4(), port).into() };
        ethernet(to, self.from, &ip(flow, TCP, &syn(flow, Flood::SEQUENCE.into())))
    }

    /// Sends a SYN from one source after the other for so long, a packet every `pace` or as fast as it goes; how many a second were sent.
    pub(crate) fn flood(&mut self, frame: &[u8], pace: Duration, time: Duration) -> Result<f64> {
        self.flood.set(0, Flood { pace: u64::try_from(pace.as_nanos())?, ..Flood::default() }, 0)?;
        let program: &mut Xdp = self.ebpf.program_mut("bench_flood").context("bench_flood")?.try_into()?;
        let (sender, done, started) = (gettid(), AtomicBool::new(false), Instant::now());
        let watched = Barrier::new(2);
        let sent = thread::scope(|scope| {
            scope.spawn(|| {
                // The sender never waits, so this thread needs a higher priority to end it.
                let goes_before = precedence(Pid::from_raw(0), 3);
                watched.wait();
                thread::sleep(if goes_before.is_ok() { time } else { Duration::ZERO });
                while !done.load(Ordering::Relaxed) {
                    interrupt(sender);
                    thread::sleep(Duration::from_millis(5));
                }
            });
            watched.wait();
            pin(OTHER_CPU).and_then(|()| undisturbed(true))?;
            let attrs = TestRunAttrs::new().xdp_live_frames(BATCH);
            let sent =
                program.test_run(TestRunOptions { data_in: Some(frame), repeat: MANY, attrs, ..TestRunOptions::new() });
            done.store(true, Ordering::Relaxed);
            anyhow::Ok(sent)
        })?;
        let took = started.elapsed();
        if took < time {
            sent.context("sending with a test run (Linux 5.18)")?;
        }
        Ok(self.flood.get(&0, 0)?.sent as f64 / took.as_secs_f64())
    }
}

extern "C" fn nothing(_: libc::c_int) {}

/// Ends the system call that a thread of this process is in.
fn interrupt(thread: Pid) {
    // SAFETY: the numbers are those of this process and of one of its threads, and the signal's handler does nothing.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread.as_raw(), libc::SIGUSR1) };
}
