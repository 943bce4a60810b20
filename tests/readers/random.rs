//! Numbers from a seed that is printed, so that a failure can be had again (SplitMix64), and the decision where a request
//! is odd.

#[derive(Clone)]
pub struct Random {
    state: u64,
    oddity: Oddity,
    /// Places so far where the request could have been odd.
    asked: usize,
}

#[derive(Clone, Copy)]
enum Oddity {
    /// So often in a thousand places.
    Often(usize),
    /// In this place alone.
    At(usize),
}

impl Random {
    pub fn new(seed: u64) -> Self {
        let mut random = Self { state: seed, oddity: Oddity::Often(0), asked: 0 };
        random.oddity = Oddity::Often([0, 20, 60, 60, 120, 250][random.below(6)]);
        random
    }

    /// Makes something. Every other time it is odd in exactly one place: two oddities tend to hide each other, because one
    /// of them is refused.
    pub fn make<T>(&mut self, make: impl Fn(&mut Self) -> T) -> T {
        if self.one_in(2) {
            let start = self.state;
            let mut trial = Self { oddity: Oddity::At(usize::MAX), asked: 0, ..self.clone() };
            drop(make(&mut trial));
            let place = self.below(trial.asked.max(1));
            // From where the trial began, so that it goes the same way up to that place.
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

    /// Whether to be odd here.
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

    /// The usual one, unless this is an odd place.
    pub fn usually<T: Copy>(&mut self, usual: T, odd: &[T]) -> T {
        if self.odd() { self.pick(odd) } else { usual }
    }
}
