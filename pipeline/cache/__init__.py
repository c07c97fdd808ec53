"""The contract between the stages: sparse teacher targets as a Parquet data set; see FORMAT.md."""
