//! How sure a match rate makes one: the upper end of the exact confidence interval.

use statrs::distribution::{Beta, ContinuousCDF};

/// One-sided; of 20 such statements one may be wrong.
pub const CONFIDENCE: f64 = 0.95;

/// The exact (Clopper-Pearson) one-sided upper bound of a rate, where `found` of `tried` were
/// found: the greatest rate at which so few would still be found once in twenty times. For none
/// found it is 1 - 0.05^(1/n), the "rule of three", some 3/n. `None` where nothing was tried.
#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
pub fn upper_bound(found: u64, tried: u64) -> Option<f64> {
    let misses = tried.checked_sub(found)?;
    match (found, misses) {
        (0, 0) => None,
        (_, 0) => Some(1.0),
        (0, _) => Some(-((1.0 - CONFIDENCE).ln() / tried as f64).exp_m1()),
        _ => {
            let beta = Beta::new(found as f64 + 1.0, misses as f64).ok()?;
            Some(quantile(&beta))
        }
    }
}

/// By bisection on the distribution function, to the last bit: its values are better known than
/// its inverse's.
fn quantile(beta: &Beta) -> f64 {
    let (mut low, mut high) = (0.0_f64, 1.0_f64);
    loop {
        let middle = f64::midpoint(low, high);
        if middle <= low || middle >= high {
            return high;
        }
        if beta.cdf(middle) < CONFIDENCE {
            low = middle;
        } else {
            high = middle;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The expected values solve P(X <= found) = 0.05 for the binomial distribution, computed with
    /// exact integers and 60 digits.
    #[test]
    fn known_values() {
        for (found, tried, expected) in [
            (0, 1, 0.95),
            (0, 10, 0.258_865_550_893_052_3),
            (0, 100, 0.029_513_049_607_039_935),
            (1, 100, 0.046_559_811_453_539_53),
            (5, 1000, 0.010_484_076_911_415_653),
            (3, 10, 0.606_624_216_105_413_4),
            (9, 10, 0.994_883_803_181_076_3),
            (50, 10_000, 0.006_324_499_770_793_831),
            (2, 3000, 0.002_097_095_855_532_433_3),
        ] {
            let bound = upper_bound(found, tried).unwrap();
            assert!(
                (bound - expected).abs() < 1e-10 * expected.max(1e-3),
                "{found} of {tried}: {bound}, not {expected}"
            );
        }
    }

    #[test]
    fn the_ends() {
        assert_eq!(upper_bound(0, 0), None);
        assert_eq!(upper_bound(7, 7), Some(1.0));
        assert_eq!(upper_bound(8, 7), None);
        // The rule of three, however many there are.
        let of_many = upper_bound(0, 1_000_000_000).unwrap() * 1e9;
        assert!((of_many - 2.995_732).abs() < 1e-5, "{of_many}");
        let few_of_many = upper_bound(3, 1_000_000_000).unwrap() * 1e9;
        // The Poisson distribution's bound for three.
        assert!((few_of_many - 7.753_656_5).abs() < 1e-5, "{few_of_many}");
    }
}
