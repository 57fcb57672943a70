//! What a file must hold, as a function of the step that wrote it.

/// The bytes and choices of one writer of one run: equal arguments give equal answers, in any process, at any time.
///
/// Records carry their step in their first eight bytes, so that a file can be judged without the process: what follows
/// can be computed again and compared.
#[derive(Debug, Clone, Copy)]
pub struct Stream {
    seed: u64,
}

/// How many low bits of a record's first word are a check of the others.
const CHECK_BITS: u32 = 16;

/// The length of a record's first word.
pub(crate) const WORD: usize = 8;

impl Stream {
    /// The stream of the writer `name` in the run `run`.
    pub fn new(run: u64, name: &str) -> Self {
        Self { seed: name.bytes().fold(mix(run), |seed, byte| mix(seed ^ u64::from(byte))) }
    }

    /// A number that depends on `step` alone.
    pub fn choose(&self, step: u64) -> u64 {
        mix(self.seed ^ mix(step))
    }

    /// The record that `step` writes at `place`; at least eight bytes long.
    pub fn record(&self, place: u64, step: u64, len: usize) -> Vec<u8> {
        let mut record = Vec::with_capacity(len + WORD);
        record.extend_from_slice(&self.word(place, step).to_le_bytes());
        let mut state = self.choose(step) ^ place;
        while record.len() < len {
            state = mix(state);
            record.extend_from_slice(&state.to_le_bytes());
        }
        record.truncate(len.max(WORD));
        record
    }

    /// The step that wrote the record at `place` that begins with `bytes`; `None` if no step did.
    pub fn step_of(&self, place: u64, bytes: &[u8]) -> Option<u64> {
        let word = u64::from_le_bytes(bytes.get(..WORD)?.try_into().ok()?);
        let step = word >> CHECK_BITS;
        (self.word(place, step) == word).then_some(step)
    }

    fn word(&self, place: u64, step: u64) -> u64 {
        let check = mix(self.choose(step) ^ place) & ((1 << CHECK_BITS) - 1);
        step << CHECK_BITS | check
    }
}

/// The finalizer of splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
pub(crate) fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_names_its_step_and_no_other() {
        let stream = Stream::new(7, "append@0");
        let record = stream.record(3, 41, 100);
        assert_eq!(record.len(), 100);
        assert_eq!(stream.step_of(3, &record), Some(41));
        assert_eq!(stream.step_of(4, &record), None);
        assert_eq!(Stream::new(8, "append@0").step_of(3, &record), None);
        assert_ne!(record, stream.record(3, 42, 100));
    }

    #[test]
    fn one_record_is_no_prefix_of_another_step() {
        let stream = Stream::new(7, "append@0");
        assert_ne!(stream.record(0, 1, 8), stream.record(0, 2, 8));
        assert_eq!(stream.record(0, 1, 8), stream.record(0, 1, 100)[..8]);
    }
}
