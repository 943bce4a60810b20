'use strict'
// Reader: Express with its own parsers for JSON and forms, multer (busboy) for multipart bodies, qs for the query, and
// method-override by header and by query, as its documents show. The report is described in report.rb.

const express = require('express')
const fs = require('fs')
const methodOverride = require('method-override')
const multer = require('multer')

const NAMES = ['private_token', 'sudo', 'access_token', 'bearer_token', 'job_token', '_method', 'page', 'per_page']
const OTHERS = ['authorization', 'sudo', 'job-token', 'deploy-token', 'x-http-method-override', 'cookie']
const log = fs.openSync(process.env.READER_LOG, 'a')

const value = it => typeof it === 'string' ? it.slice(0, 100) : { odd: String(JSON.stringify(it)).slice(0, 100) }

function pick (source, params) {
  if (params === null || typeof params !== 'object') return []
  return NAMES.filter(name => Object.hasOwn(params, name) && params[name] !== null && params[name] !== undefined)
    .map(name => [source, name, value(params[name])])
}

const ascii = text => text.replace(/[\u007f-\uffff]/g, c => '\\u' + c.charCodeAt(0).toString(16).padStart(4, '0'))

function answer (req, res, error) {
  let seen = []
  let fields = 0
  let method = req.method
  if (!error) {
    const files = Object.create(null)
    for (const file of req.files || []) files[file.fieldname] = 'a file'
    seen = [...pick('query', req.query), ...pick('body', req.body), ...pick('file', files)]
    fields = (req.files || []).length
    if (req.body && typeof req.body === 'object' && !Array.isArray(req.body)) fields += Object.keys(req.body).length
    // The third way of method-override's documents: by the body.
    if (method === 'POST' && req.body && typeof req.body === 'object' && '_method' in req.body) {
      method = String(req.body._method).toUpperCase()
    }
  }
  const others = OTHERS.filter(name => name in req.headers).map(name => [name, value(req.headers[name])])
  const header = req.headers['private-token'] ?? null
  const report = { m: method, h: header, x: others, s: seen, n: fields, e: error ? value(`${error.name}: ${error.message}`) : null }
  if (seen.length) fs.writeSync(log, ascii(JSON.stringify({ id: req.headers['x-request-id'], r: report })) + '\n')
  res.set('X-Path', req.guarded || ascii(req.path))
  res.set('X-Seen', ascii(JSON.stringify(report))).type('json').send('{}')
}

const app = express()
app.set('query parser', 'extended')
app.set('x-powered-by', false)
app.set('etag', false)
app.use(methodOverride('X-HTTP-Method-Override'))
app.use(methodOverride('_method'))
app.use(express.json())
app.use(express.urlencoded({ extended: true }))
app.use(multer().any())
// Routes of Express's own router, which minds no letter case.
for (const path of ['/api/v3/projects', '/api/v3/open/secret']) {
  app.use(path, (req, res, next) => { req.guarded = path; next() })
}
for (const path of ['/api/v3/open/group/secret', '/api/v3/may/not']) {
  app.all(path, (req, res, next) => { req.guarded = path; next() })
}
app.use((req, res) => answer(req, res, null))
app.use((error, req, res, next) => answer(req, res, error))
const server = app.listen(Number(process.argv[2]), '127.0.0.1')
server.keepAliveTimeout = 600000
