"""The callbacks of AWS's SDKs, `/@connections/<id>`, for `--backend=apigateway`.

`routes` has the handlers, `access` who may call, `sigv4` verifies signatures, and
`errors` words failures as AWS does.
"""
