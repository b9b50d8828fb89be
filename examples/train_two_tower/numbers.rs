//! Numbers of the command line: read with errors that name the rule, and written so that they can be read.

/// A parser of whole numbers from `least` to `most`, for the command line.
pub fn whole(least: u64, most: u64) -> impl Fn(&str) -> Result<usize, String> + Clone + Send + Sync {
    move |text| {
        let rule = || format!("rule: a whole number from {least} to {most}");
        let number: u64 = text.parse().map_err(|_| rule())?;
        if number < least || number > most {
            return Err(rule());
        }
        usize::try_from(number).map_err(|_| rule())
    }
}

/// What a step multiplies or divides by, in single precision.
pub fn positive(text: &str) -> Result<f64, String> {
    const RULE: &str = "rule: a number from 1e-38 to 3e38";
    match text.parse::<f64>() {
        Ok(x) if (1e-38..=3e38).contains(&x) => Ok(x),
        _ => Err(RULE.into()),
    }
}

pub fn finite(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(x) if x.is_finite() => Ok(x),
        _ => Err("rule: a finite number".into()),
    }
}

/// Without hundreds of zeros: 1e308, and not all of its digits.
pub fn readable(x: f64) -> String {
    if x == 0.0 || (1e-5..1e16).contains(&x.abs()) { x.to_string() } else { format!("{x:e}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_the_rule() {
        assert_eq!(whole(1, 9)("9"), Ok(9));
        for text in ["0", "10", "-1", "abc", "", "1.5", "18446744073709551616"] {
            assert_eq!(whole(1, 9)(text).unwrap_err(), "rule: a whole number from 1 to 9");
        }
        assert_eq!(positive("0.07"), Ok(0.07));
        for text in ["0", "-1", "nan", "inf", "1e-300", "1e300", "abc"] {
            assert_eq!(positive(text).unwrap_err(), "rule: a number from 1e-38 to 3e38");
        }
        assert_eq!(finite("-1.5"), Ok(-1.5));
        for text in ["nan", "-inf", "1e999", ""] {
            assert_eq!(finite(text).unwrap_err(), "rule: a finite number");
        }
    }

    #[test]
    fn extreme_numbers_are_short() {
        for (x, text) in [(0.75, "0.75"), (2.0, "2"), (-0.5, "-0.5"), (0.0, "0"), (1e308, "1e308"), (1e-300, "1e-300")]
        {
            assert_eq!(readable(x), text);
        }
    }
}
