"""Traffic files as replicas write them, for the tests of the search."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def write_traffic(storage, base, inputs, labels, segments=None):
    """Drifted instances with their labels, one file."""
    n = len(inputs)
    table = pa.table(
        {
            "id": [f"i{i}" for i in range(n)],
            "time_s": 1000.0 + np.arange(n),
            "segment": ["all"] * n if segments is None else segments,
            "digest": ["base"] * n,
            "generation": [0] * n,
            "prediction": np.arange(n) % 4,
            "confidence": np.ones(n, np.float32),
            "input": pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(inputs)),
            "label": pa.array(labels, pa.int64()),
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    storage.put(f"traffic/base={base}/date=1970-01-01/r-0.parquet", sink.getvalue().to_pybytes())
