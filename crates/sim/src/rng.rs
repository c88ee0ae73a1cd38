//! Random numbers that no update of a dependency changes: SplitMix64 (Steele, Lea and Flood 2014) and
//! the few distributions that the workloads need.

/// A seeded generator.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// The generator of this seed.
    pub fn new(seed: u64) -> Self {
        Rng(seed)
    }

    /// 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in (0, 1).
    pub fn uniform(&mut self) -> f64 {
        ((self.next_u64() >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }

    /// Uniform in 0..`bound`; 0 if `bound` is 0.
    pub fn below(&mut self, bound: usize) -> usize {
        ((u128::from(self.next_u64()) * bound as u128) >> 64) as usize
    }

    /// Standard normal (Box and Muller).
    pub fn normal(&mut self) -> f64 {
        (-2.0 * self.uniform().ln()).sqrt() * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// Log-normal with this median and this standard deviation of the logarithm.
    pub fn log_normal(&mut self, median: f64, sigma: f64) -> f64 {
        median * (sigma * self.normal()).exp()
    }

    /// Gamma with mean 1 and this coefficient of variation (Marsaglia and Tsang 2000).
    pub fn gamma(&mut self, variation: f64) -> f64 {
        let shape = 1.0 / (variation * variation);
        let (boosted, factor) =
            if shape < 1.0 { (shape + 1.0, self.uniform().powf(1.0 / shape)) } else { (shape, 1.0) };
        let d = boosted - 1.0 / 3.0;
        let c = 1.0 / (9.0 * d).sqrt();
        loop {
            let x = self.normal();
            let v = (1.0 + c * x).powi(3);
            if v > 0.0 && self.uniform().ln() < 0.5 * x * x + d - d * v + d * v.ln() {
                return d * v * factor / shape;
            }
        }
    }
}

/// Draws from a fixed list of weights.
#[derive(Clone, Debug)]
pub struct Weighted {
    cumulative: Vec<f64>,
}

impl Weighted {
    /// Weights are at least 0, not all 0.
    pub fn new(weights: impl IntoIterator<Item = f64>) -> Self {
        let mut sum = 0.0;
        let cumulative = weights.into_iter().map(|weight| {
            sum += weight;
            sum
        });
        Weighted { cumulative: cumulative.collect() }
    }

    /// Weights 1/rank^`exponent` for `count` ranks.
    pub fn zipf(count: usize, exponent: f64) -> Self {
        Self::new((1..=count).map(|rank| (rank as f64).powf(-exponent)))
    }

    /// An index, with the probability of its weight.
    pub fn draw(&self, rng: &mut Rng) -> usize {
        let at = rng.uniform() * self.cumulative.last().copied().unwrap_or(0.0);
        self.cumulative.partition_point(|&sum| sum <= at).min(self.cumulative.len().saturating_sub(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distributions_have_their_moments() {
        let mut rng = Rng::new(7);
        for variation in [0.25, 1.0, 3.0] {
            let draws: Vec<f64> = (0..200_000).map(|_| rng.gamma(variation)).collect();
            let mean = draws.iter().sum::<f64>() / draws.len() as f64;
            let variance = draws.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / draws.len() as f64;
            assert!((mean - 1.0).abs() < 0.03, "{mean}");
            assert!((variance.sqrt() / variation - 1.0).abs() < 0.05, "{variance}");
        }
        let zipf = Weighted::zipf(3, 1.0);
        let mut counts = [0; 3];
        (0..60_000).for_each(|_| counts[zipf.draw(&mut rng)] += 1);
        assert!(counts[0] > counts[1] * 18 / 10 && counts[1] > counts[2] * 13 / 10, "{counts:?}");
        assert!((0..1000).map(|_| rng.below(5)).all(|i| i < 5));
    }
}
