//! Random numbers from a printed seed (SplitMix64), so that a failure can be reproduced, and the decision where a
//! request is unusual.

#[derive(Clone)]
pub struct Random {
    state: u64,
    oddity: Oddity,
    /// Number of places so far where the request could have been unusual.
    asked: usize,
}

#[derive(Clone, Copy)]
enum Oddity {
    /// With this frequency, per thousand places.
    Often(usize),
    /// In this place only.
    At(usize),
}

impl Random {
    pub fn new(seed: u64) -> Self {
        let mut random = Self { state: seed, oddity: Oddity::Often(0), asked: 0 };
        random.oddity = Oddity::Often([0, 20, 60, 60, 120, 250][random.below(6)]);
        random
    }

    /// Generates a value. Half of the values are unusual in exactly one place: of two unusual places, one tends to hide
    /// the other because it is refused.
    pub fn make<T>(&mut self, make: impl Fn(&mut Self) -> T) -> T {
        if self.one_in(2) {
            let start = self.state;
            let mut trial = Self { oddity: Oddity::At(usize::MAX), asked: 0, ..self.clone() };
            drop(make(&mut trial));
            let place = self.below(trial.asked.max(1));
            // From the state at the start of the trial, so that it is repeated identically up to that place.
            (self.state, self.oddity) = (start, Oddity::At(place));
        }
        make(self)
    }

    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    /// Whether to be unusual in this place.
    pub fn odd(&mut self) -> bool {
        self.asked += 1;
        match self.oddity {
            Oddity::Often(times) => self.below(1000) < times,
            Oddity::At(place) => self.asked - 1 == place,
        }
    }

    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }

    /// The usual value, unless this place is to be unusual.
    pub fn usually<T: Copy>(&mut self, usual: T, odd: &[T]) -> T {
        if self.odd() { self.pick(odd) } else { usual }
    }
}
